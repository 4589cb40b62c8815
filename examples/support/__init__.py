"""Shared by the programs: training in lockstep, options, progress and messages, files that are written whole."""
