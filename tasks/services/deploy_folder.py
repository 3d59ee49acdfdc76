"""Files of the folder ``deploy/``, which a checkout and the image have, and a wheel has not."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import InputError

DEPLOY = Path(__file__).parents[2] / "deploy"


def deploy_file(name: str, *, otherwise: str = "") -> Path:
    """Path of a file of ``deploy/``.

    Args:
        name: Name of the file.
        otherwise: Another way out, added to the message.
    Raises:
        InputError: lorafleet was installed without ``deploy/``.
    """
    file = DEPLOY / name
    if not file.is_file():
        raise InputError(
            f"deploy/{name} is missing, because this lorafleet was installed without its folder deploy/; "
            f"install a checkout (`make setup`), or use the image{otherwise}"
        )
    return file
