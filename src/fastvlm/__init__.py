"""FastVLM: a picture and a question in, the answer out."""
