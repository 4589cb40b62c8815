"""What the programs share: training in lockstep, options, progress and messages, files that are never half written."""
