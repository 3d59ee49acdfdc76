"""A user's own files of texts: found on any file system, and read from CSV, JSON Lines or Parquet."""
