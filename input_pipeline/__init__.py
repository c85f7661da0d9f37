"""From the images of a data set to a model's input on the device."""
