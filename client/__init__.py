"""What runs at a site: the Site itself, and the Flower app that speaks for it."""
