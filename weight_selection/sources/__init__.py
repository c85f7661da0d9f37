"""Where models and weights come from, and what a model answers about itself.

This module, ``names``, ``directories``, ``hub``, ``recipe`` and ``widths`` import no torch.

- ``names``: which library a name belongs to; ``timm_names``, ``transformers_names``, ``torchvision_names``: the models
  and the weights that each library has under it.
- ``facts``: what a model answers about itself; ``timm_models``, ``transformers_models`` (with ``transformers_inputs``),
  ``torchvision_models``: what each library answers for its models. ``timm_models`` also builds timm's by name.
- ``widths``: the arguments of a narrower or shallower model (``--width``, ``--depth``).
- ``directories``, ``hub``: where the files are, on disk or in a repository of the hub.
- ``timm_hub``, ``transformers_hub``: writing the directory that each library opens (``--format hub``).
- ``architectures``: what files and releases know of an architecture: components, conversions, conventions.
- ``weight_files``, ``torchscript``, ``safe_load``: state_dicts in files, read lazily and safely.
- ``teachers``, ``initial_weights``: a teacher's weights in any layout; a student's first weights.
- ``recipe``: the student in a recipe of main.py.
"""

COMPONENTS = ("attention", "mlp", "norm", "patch_embed", "pos_embed")  # what ``exclude`` can name (Table 10)

# --model_type: (student, teacher) of the paper's main experiments (Table 1).
MODEL_TYPES = {
    "vit": ("vit_tiny", "vit_small_patch16_224.augreg_in21k"),
    "convnext": ("convnext_femto", "convnext_tiny.fb_in22k"),
}
