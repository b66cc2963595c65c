"""Video-language representation learning with Hierarchical Banzhaf Interaction."""
