"""LLM-DataDist's Python API on ordinary hosts; stands in for `import llm_datadist`."""
