"""Patches that save time or memory at start-up; a run that lacks one works, or fails before it trains."""
