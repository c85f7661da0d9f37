"""Beyond the paper: first weights fitted to the teacher's by least squares on a few images."""
