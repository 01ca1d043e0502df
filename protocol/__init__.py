"""What coordinator and sites say to each other."""
