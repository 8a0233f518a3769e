"""Ways in which the files of a source come from elsewhere."""
