"""The code in an export that `transformers` has to be trusted with: it makes plain decoding impossible by accident.

Loaded as what it was trained as, an export writes plain tokens, which it never learned, and nothing says so. So its
`config.json` has a model type that `transformers` does not know, and names the classes below: without
`trust_remote_code=True` loading is refused. Loaded, the configuration is of the base type again. Where it is saved,
what the export consists of besides weights, configuration and tokenizer is saved beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

MODEL_TYPE = "latent_sft"  # in config.json; the type that the model was trained as is in `base_model_type`
REMOTE_FILE = "latent_model.py"

TEMPLATE = '''"""This checkpoint thinks in latent tokens: classes of transformers, and what has to be saved with them.

They make `transformers` ask for `trust_remote_code=True`. Without the code in `custom_generate` the model would write
plain tokens, which it was not trained for.
"""

import json
import os
import shutil

import transformers
from transformers.utils import cached_file

FILES = {files!r}


class {config}(transformers.{config}):
    @classmethod
    def get_config_dict(cls, *args, **kwargs):
        values, kwargs = super().get_config_dict(*args, **kwargs)
        return {{**values, "model_type": cls.model_type}}, kwargs

    def to_json_string(self, *args, **kwargs):
        values = json.loads(super().to_json_string(*args, **kwargs))
        return json.dumps({{**values, "model_type": "{model_type}"}}, indent=2, sort_keys=True) + "\\n"

    def save_pretrained(self, save_directory, *args, **kwargs):
        for name in FILES:
            source = cached_file(self.name_or_path, name, revision=getattr(self, "_commit_hash", None))
            target = os.path.join(save_directory, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            if not os.path.exists(target) or not os.path.samefile(source, target):
                shutil.copyfile(source, target)
        super().save_pretrained(save_directory, *args, **kwargs)


class {model}(transformers.{model}):
    config_class = {config}

    @classmethod
    def is_custom_code(cls):
        return False  # the modules are those of transformers, and so are its conversions of weights
'''


def remote_code(config: dict[str, Any], files: Iterable[str]) -> tuple[dict[str, Any], str]:
    """Return `config.json` of an export and the code it names, or what was given and nothing.

    Args:
        config: `config.json` of the trained model, or of an export of it.
        files: what belongs to a saved model besides weights, configuration and tokenizer; paths inside the folder.

    Returns:
        The configuration and the source of REMOTE_FILE; empty where the model brings its own code, and so has to be
        trusted already.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    base = config.get("base_model_type", config["model_type"])
    if base not in CONFIG_MAPPING or CONFIG_MAPPING[base] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return config, ""
    own, model = CONFIG_MAPPING[base].__name__, MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[base]].__name__
    module = REMOTE_FILE.removesuffix(".py")
    auto_map = {"AutoConfig": f"{module}.{own}", "AutoModelForCausalLM": f"{module}.{model}"}
    changed = {**config, "model_type": MODEL_TYPE, "base_model_type": base, "auto_map": auto_map}
    return changed, TEMPLATE.format(files=tuple(files), config=own, model=model, model_type=MODEL_TYPE)
