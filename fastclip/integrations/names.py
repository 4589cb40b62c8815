"""The names under which toolkits with a table of optimizers find fastclip's: lower case, as their own."""

import fastclip

# "fastclip_sgd", "fastclip_adamw" and so on.
OPTIMIZERS = {
    f"fastclip_{name.lower()}": getattr(fastclip, name)
    for name in ("SGD", "Adam", "AdamW", "Adadelta", "Adagrad", "NAdam", "RAdam", "RMSprop", "Lion")
}
