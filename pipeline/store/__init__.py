"""The run store on disk: folders, files, locks, tables, and what may be deleted. Knows nothing of torch."""
