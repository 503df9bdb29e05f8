"""Losses, directional derivatives, Hessian-vector products and eigenpairs."""
