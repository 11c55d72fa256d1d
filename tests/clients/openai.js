// Asks a server by OpenAI's own client, and prints the texts of its answers as JSON, by their names.
//
// Arguments: the URL of the API, a model with a chat template, and a question.
import OpenAI from "openai";

const [url, model, question] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "none", maxRetries: 0 });
const asked = { model, temperature: 0, max_tokens: 9 };
const messages = [{ role: "system", content: "Be brief." }, { role: "user", content: question }];
const answers = {};

answers["chat"] = (await client.chat.completions.create({ ...asked, messages })).choices[0].message.content;
let text = "";
for await (const part of await client.chat.completions.create({ ...asked, messages, stream: true })) {
  text += part.choices[0]?.delta.content ?? "";
}
answers["chat, streamed"] = text;
const several = await client.chat.completions.create({ ...asked, temperature: 1, messages, n: 2, seed: 5 });
answers["chat, n"] = several.choices.map((choice) => choice.message.content).join("|");
answers["completion"] = (await client.completions.create({ ...asked, prompt: question })).choices[0].text;
text = "";
for await (const part of await client.completions.create({ ...asked, prompt: question, stream: true })) {
  text += part.choices[0].text;
}
answers["completion, streamed"] = text;
const biased = await client.completions.create({ ...asked, prompt: question, logit_bias: { 65: 100 } });
answers["completion, biased"] = biased.choices[0].text;
const both = await client.completions.create({ ...asked, prompt: [question, "x"] });
answers["completions"] = both.choices.map((choice) => choice.text).join("|");
answers["models"] = (await client.models.list()).data.map((each) => each.id).includes(model);
console.log(JSON.stringify(answers));
