"""Curvature of the training loss: fitted from per-example gradients, solved against one gradient."""

from attrib_jax.curvature.diagonal import Diagonal
from attrib_jax.curvature.ekfac import EKFAC, fisher_ekfac
from attrib_jax.curvature.fisher import FisherSum, fisher_diagonal

__all__ = ["EKFAC", "Diagonal", "FisherSum", "fisher_diagonal", "fisher_ekfac"]
