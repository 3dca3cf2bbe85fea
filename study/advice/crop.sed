# Training pictures are moved by up to an eighth of their height, anew in every epoch.
s/^AUGMENT = None/AUGMENT = data.random_crop/
