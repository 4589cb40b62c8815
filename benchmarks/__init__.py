"""Speed and agreement of fastclip against what torch offers, on the parameter shapes of speech models."""
