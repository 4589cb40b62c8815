"""How fast fastclip is beside what torch offers, on the parameter shapes of speech models."""
