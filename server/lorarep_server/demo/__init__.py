"""What `lorarep demo` needs and the tests share."""
