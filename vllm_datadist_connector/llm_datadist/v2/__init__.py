"""The current generation of the LLM-DataDist Python API."""
