"""Parquet files as other tools write them: footers, types, metadata, and the live files of Delta and Iceberg tables."""
