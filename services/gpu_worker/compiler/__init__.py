"""Static compilation: from the decoder layer and a PEFT method to the programs that run and what they keep.

trace -> bypass -> reverse -> prune -> rematerialize -> emit; parallelize chooses how bypasses are sharded.
Source: FlexLLM (arXiv 2402.18789), section 5.
"""
