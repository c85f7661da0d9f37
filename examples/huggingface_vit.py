"""A small ViT of Hugging Face with first weights from a larger one: python examples/huggingface_vit.py

The models are tiny and random, so that this runs in seconds. A published teacher is opened by its name:
ViTForImageClassification.from_pretrained("google/vit-base-patch16-224-in21k").
"""

import torch
from transformers import ViTConfig, ViTForImageClassification

from weight_selection import select_weights

sizes = {"image_size": 32, "patch_size": 8}
teacher_config = ViTConfig(hidden_size=96, num_attention_heads=6, intermediate_size=384, num_hidden_layers=4, **sizes)
student_config = ViTConfig(hidden_size=48, num_attention_heads=3, intermediate_size=192, num_hidden_layers=2, **sizes)
student_config.num_labels = 10
teacher, student = ViTForImageClassification(teacher_config), ViTForImageClassification(student_config)

weights = select_weights(teacher, student)
own = student.load_state_dict(weights, strict=False).missing_keys
print(f"{len(weights)} tensors are selected; the student keeps its own {' and '.join(own)}")

# Then train it as ever: here on eight random images.
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
for step in range(3):
    optimizer.zero_grad()
    loss = student(pixel_values=images, labels=labels).loss
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
