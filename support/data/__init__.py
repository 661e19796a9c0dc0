"""Data sets of pictures and latents, and the batches of a run.

Here are silenced, once for all threads and workers, warnings that a user can do nothing about.
"""

import warnings

# Pillow warns about metadata that it cannot read, which leaves the pixels as they are, and about
# large pictures, which `images.read_image` refuses.
warnings.filterwarnings("ignore", module=r"PIL\.")
# torch warns where loader workers outnumber the cores, which is the user's choice: `num_workers`.
warnings.filterwarnings("ignore", "This DataLoader will create")
