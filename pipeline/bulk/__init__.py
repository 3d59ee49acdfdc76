"""A bulk job without Ray: Parquet in, Parquet out, in units that appear whole or not at all."""
