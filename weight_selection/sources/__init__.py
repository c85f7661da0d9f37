"""Where models and weights come from, and what a model answers about itself. Imports no torch; the modules in here do.

- ``names``: which library a name belongs to; ``timm_names``, ``transformers_names``, ``torchvision_names``: the models
  and the weights that each library has under it.
- ``directories``, ``hub``: where the files are, on disk or in a repository of the hub.
- ``timm_models``: models by name, and what timm knows of them: image size, layers, first convolutions.
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
