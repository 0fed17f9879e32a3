"""The experiments of this folder, installed as `latent_sft.presets`; see `latent_sft.config.presets`."""
