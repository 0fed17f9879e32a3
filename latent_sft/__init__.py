"""latent_sft: teach a causal language model to reason in latent tokens. Importing this imports nothing heavy."""

__version__ = "0.1.0"
