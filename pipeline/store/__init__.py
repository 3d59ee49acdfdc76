"""The run store on disk: folders, files, locks, manifests and keys. Does not use torch."""
