"""First weights for a model of your own, in your own training loop. The images of digits are scikit-learn's."""

import torch
import torch.nn as nn
from sklearn.datasets import load_digits

from weight_selection import select_weights


class Network(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.stem, self.head = nn.Linear(64, width), nn.Linear(width, 10)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(depth)])

    def forward(self, images):
        features = self.stem(images)
        for layer in self.layers:
            features = features + layer(features).relu()
        return self.head(features)


def train(model, epochs):
    """Train on 1,200 images; returns the accuracy on the others."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(1200).split(100)):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return (model(images[1200:]).argmax(1) == labels[1200:]).float().mean()


torch.manual_seed(0)
images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
images = images.float() / 16
teacher, selected, random = Network(128, 4), Network(64, 2), Network(64, 2)
print(f"teacher, 6 epochs: {train(teacher, 6):.1%}")
selected.load_state_dict(select_weights(teacher, selected, example_inputs=images[:1]))
print(f"student, 2 epochs: {train(selected, 2):.1%} from selected weights, {train(random, 2):.1%} from random ones")
