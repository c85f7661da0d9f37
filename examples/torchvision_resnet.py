"""A ResNet-18 for 10 classes with first weights from a ResNet-34: python examples/torchvision_resnet.py [DEFAULT]"""

import sys

import torch
import torchvision

from weight_selection import select_weights

published = sys.argv[1] if len(sys.argv) > 1 else None  # DEFAULT downloads the weights that torchvision publishes
teacher = torchvision.models.resnet34(weights=published)
student = torchvision.models.resnet18(num_classes=10)

weights = select_weights(teacher, student)
own = student.load_state_dict(weights, strict=False).missing_keys
print(f"{len(weights)} tensors are selected; the student keeps its own {' and '.join(own)}")

# Then train it as ever: here on eight random images.
images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)
for step in range(2):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(student(images), labels)
    loss.backward()
    optimizer.step()
    print(f"step {step}: loss {loss.item():.3f}")
