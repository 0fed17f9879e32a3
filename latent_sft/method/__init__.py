"""The algorithm: pure functions over tensors. Imports torch, the standard library and `latent_sft.errors` only.

Shape letters used throughout, with the paper's symbols (arXiv 2510.15522):

    B  batch                 T  sequence positions      V  vocabulary size
    N  latents of a row      K  kept vocabulary entries D  hidden size
    r  CoT tokens per latent (`rate`)

Masks have one polarity everywhere: True means "may attend".
"""
