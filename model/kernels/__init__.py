"""How attention and products of matrices are computed, where torch's own way is not the fastest."""
