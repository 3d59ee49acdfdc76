"""The commands of lorafleet, one file each. ``flows/cli.py`` registers them."""
