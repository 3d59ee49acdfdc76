"""The run store on disk: folders, files, locks, tables and retention. Does not use torch."""
