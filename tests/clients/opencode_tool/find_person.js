// A tool of OpenCode's, without parameters: those would need its plugin package.
export default {
  description: "Where a person is",
  args: {},
  execute: async () => JSON.stringify({ room: "kitchen" }),
};
