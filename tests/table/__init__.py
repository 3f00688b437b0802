"""The table of ops: a row for each, with its cases and the unit of its errors. A file here joins by itself."""

from importlib import import_module
from pkgutil import iter_modules

from proving import Op

from .cosine import COSINE, INDEXED, MSE
from .resize import PREPROCESS
from .standardize import STANDARDIZE
from .vicreg import VICREG

OPS = (COSINE, INDEXED, MSE, STANDARDIZE, PREPROCESS, VICREG)
for module in iter_modules(__path__):
    rows = vars(import_module(f"table.{module.name}")).values()
    OPS += tuple(row for row in rows if isinstance(row, Op) and row not in OPS)
