"""Blocks computed by code that torch compiles on this machine (`torch.compile`)."""
