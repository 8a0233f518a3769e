"""Denoiser view, integrators, image generation and evaluation."""
