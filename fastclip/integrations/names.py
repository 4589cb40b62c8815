"""The names under which toolkits with a table of optimizers find fastclip's: lower case, as their own."""

from .. import patching
from ..lion import Lion
from ..novograd import NovoGrad

# "fastclip_sgd", "fastclip_adamw" and so on.
OPTIMIZERS = {f"fastclip_{cls.__name__.lower()}": cls for cls in (*patching.OPTIMIZERS.values(), Lion, NovoGrad)}
