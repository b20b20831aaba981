"""Helpers of the LLM-DataDist package."""
