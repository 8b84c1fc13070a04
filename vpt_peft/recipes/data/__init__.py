"""Images and their labels: folders and Hub datasets, checks of files, augmentation, handwritten digits."""
