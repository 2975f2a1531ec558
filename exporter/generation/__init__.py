"""From prompts to pictures, with diffusers' own pipelines around the original or an exported transformer."""
