"""`fastvlm quantize`: the language model's matrices to 4 or 8 bits."""
