"""OCI images of a checkpoint: layers, layouts, and their way to a registry and back."""
