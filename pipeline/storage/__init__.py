"""Files on any file system that fsspec knows: local, S3, the Hub. Files appear whole or not at all."""
