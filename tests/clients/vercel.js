// Asks a server by Vercel's AI SDK, and prints what it gives as JSON, by names.
//
// Arguments: the URL of the API, a model with a chat template, one whose template tells tools, and a question.
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, stepCountIs, streamObject, streamText, tool } from "ai";

globalThis.AI_SDK_LOG_WARNINGS = false;
const [url, model, caller, question] = process.argv.slice(2);
const server = createOpenAICompatible({
  name: "lorarep", baseURL: url, apiKey: "none", includeUsage: true, supportsStructuredOutputs: true,
});
const asked = { maxRetries: 0, seed: 5 };
const chat = {
  ...asked, model: server(model), temperature: 0, maxOutputTokens: 9,
  instructions: "Be brief.", prompt: question,
};
const trip = jsonSchema({
  type: "object",
  properties: { city: { enum: ["Rome", "Oslo"] }, days: { enum: [1, 2, 3] } },
  required: ["city", "days"],
  additionalProperties: false,
  "x-guidance": { whitespace_flexible: false },
});
const answers = {};

answers["chat"] = (await generateText(chat)).text;
const streamed = streamText(chat);
let text = "";
for await (const part of streamed.textStream) text += part;
answers["chat, streamed"] = text;
answers["usage"] = (await streamed.usage).outputTokens;

const object = { ...asked, model: server(caller), temperature: 1, maxOutputTokens: 200, prompt: question };
answers["object"] = (await generateObject({ ...object, schema: trip })).object;
for await (const part of streamObject({ ...object, schema: trip }).partialObjectStream) {
  answers["object, streamed"] = part;
}

const tools = { weather: tool({ description: "The weather.", inputSchema: trip, execute: async () => "rain" }) };
const call = { ...object, tools, toolChoice: "required" };
const whole = await generateText(call);
answers["calls"] = whole.toolCalls.map((each) => each.input);
answers["results"] = whole.toolResults.map((each) => each.output);
answers["calls, streamed"] = [];
for await (const part of streamText(call).stream) {
  if (part.type === "tool-call") answers["calls, streamed"].push(part.input);
}
// The result goes back to the model, which is free to answer then.
const steps = await generateText({
  ...call, maxOutputTokens: 100, stopWhen: stepCountIs(2),
  prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber ? "auto" : "required" }),
  providerOptions: { lorarep: { parallel_tool_calls: false } },
});
answers["steps"] = steps.steps.map((each) => each.toolCalls.length);
console.log(JSON.stringify(answers));
