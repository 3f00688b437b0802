"""The table of ops: a row for each, with its cases and the unit of its errors."""

from .cosine import COSINE, MSE
from .resize import PREPROCESS
from .standardize import STANDARDIZE
from .vicreg import VICREG

OPS = (COSINE, MSE, STANDARDIZE, PREPROCESS, VICREG)
