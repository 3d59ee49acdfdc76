"""The input of a bulk job: Parquet files, checked, cut into units of rows, and recognised when they change."""
