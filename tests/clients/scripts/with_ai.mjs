// Vercel's AI SDK: streamText runs the loop itself, tools included, up to the answer.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { stepCountIs, streamText, tool } from "ai";
import { z } from "zod";

const questions = ["Where is Omar?", "What time is it in Oslo?", "Where is Lena?"];
const provider = createOpenAICompatible({ name: "local", baseURL: `${process.argv[2]}/v1`, includeUsage: true });
const calls = [], replies = [], cached = [];

function declared(name, description, argument, values, result) {
  return tool({
    description,
    inputSchema: z.object({ [argument]: z.enum(values) }),
    execute: async (input) => {
      calls.push([name, input]);
      return result;
    },
  });
}

const tools = {
  find_person: declared("find_person", "Where a person is", "person", ["Omar", "Lena"], { room: "kitchen" }),
  get_time: declared("get_time", "Local time in a city", "city", ["Oslo", "Lima"], { hour: "10:15" }),
};
const messages = [];
for (const question of questions) {
  messages.push({ role: "user", content: question });
  const result = streamText({
    model: provider("default_model"),
    system: "You are a helpful assistant.",
    messages,
    tools,
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
    stopWhen: stepCountIs(4),
    maxRetries: 0,
    onError: ({ error }) => {
      throw error;
    },
  });
  replies.push(await result.text);
  for (const step of await result.steps) cached.push(step.usage.cachedInputTokens);
  messages.push(...(await result.response).messages);
}
console.log(JSON.stringify({ calls, replies, cached }));
