"""Floor 3: U-REPA, a diffusion U-Net of transformer blocks aligned with a frozen vision encoder."""
